"""From records and their order to batches."""
