"""Start-up comparison and watchdog of the ranks of a run: `rendezvous.join` and `watchdog.Watchdog`."""
