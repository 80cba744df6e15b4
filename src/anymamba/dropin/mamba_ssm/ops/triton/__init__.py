"""What the original wrote in Triton: updates, norms, state space duality."""
