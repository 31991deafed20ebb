"""Other people's networks, and the names that the released PixNerd gives its weights: borrowed, not explained here."""
