"""What a network does under attack: predictions, metrics, the record on disk, and whether to believe it."""
