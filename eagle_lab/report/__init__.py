"""Words, tables, charts and templates: records as a reader sees them."""
