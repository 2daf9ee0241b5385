"""What a run tells while it trains: the journal, its view in wandb, progress bars, its environment."""
