"""Reports: counts, timings, records, tables and plots."""
