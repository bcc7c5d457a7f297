"""From a CSV to records: nothing here knows torch."""
