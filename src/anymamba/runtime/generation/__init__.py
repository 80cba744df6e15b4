"""From logits to text: sampling, stopping, detokenizing as the tokens come."""
