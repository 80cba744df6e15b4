"""What all benchmarks share: shapes, limits, clocks, tables, and the machine's description."""
