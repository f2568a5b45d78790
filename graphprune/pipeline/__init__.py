"""What a pass is, passes in a row, and what happens between them."""
