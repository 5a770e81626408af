"""Small convex problems of K tasks, solved exactly in float64, each with a certificate of its solution."""
