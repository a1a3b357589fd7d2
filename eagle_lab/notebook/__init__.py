"""What exists only inside Jupyter: explorer, controls, live decodes, parameters."""
