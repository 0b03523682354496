"""What several benchmarks use; no benchmark itself."""
