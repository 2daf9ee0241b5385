"""Many runs at once: Hydra launchers that train them, and tables of how far they are."""
