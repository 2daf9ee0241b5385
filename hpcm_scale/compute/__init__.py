"""What training costs: floating-point operations, memory, and what the hardware could do."""
