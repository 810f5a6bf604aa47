"""The page at `/`: a chat that shows which model wrote each token."""
