"""What is asked for and what comes back: requests, snapshots, results. No I/O."""
