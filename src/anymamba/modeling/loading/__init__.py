"""`from_pretrained`: finding, reading and checking weights in every layout and format."""
