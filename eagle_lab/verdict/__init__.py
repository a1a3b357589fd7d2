"""From pairs of seconds to a decision: statistics, agreement, comparison, simulation, calibration, history."""
