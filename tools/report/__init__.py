"""What was measured, as tables, charts, pictures and a page."""
