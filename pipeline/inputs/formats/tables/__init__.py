"""Read Parquet tables: which columns hold what, and what becomes a row."""
