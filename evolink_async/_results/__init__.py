"""From result links to checked files on disk."""
