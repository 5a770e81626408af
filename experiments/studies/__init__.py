"""Studies: the same methods, with equal budgets for tuning, on several problems."""
