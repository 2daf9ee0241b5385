"""Laws of the loss: L(N), L(C), L(N, D), and the compute-optimal law that follows from L(N, D)."""
