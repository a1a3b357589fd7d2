"""One number from a run: pairs, worker processes, spans, records, environment, floor, acceptance length."""
