"""What a run would take: its stages on tensors without data, and a real step that is timed."""
