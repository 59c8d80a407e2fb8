"""Find the best shape of a student under limits: analysis, healing, cost models, proxies, search."""
