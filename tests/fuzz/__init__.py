"""Differential fuzzing of `balance.Balancer.backward`: random networks, an explicit oracle, comparison of every gradient."""
