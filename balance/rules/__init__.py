"""Rules: what a loss balancer and a gradient balancer are, and where they are registered, built and composed."""
