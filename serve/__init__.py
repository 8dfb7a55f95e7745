"""The page on which people give feedback, the chat server, and the loop that learns from both."""
