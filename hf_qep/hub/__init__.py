"""From a measured checkpoint to the Hub: card, push, check, Space."""
