"""How weights are measured: golden numbers, benchmarks, response curves."""
