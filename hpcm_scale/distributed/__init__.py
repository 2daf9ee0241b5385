"""The processes of a run: how they meet, and watch each other."""
