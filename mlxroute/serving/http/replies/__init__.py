"""Replies: answers as JSON bodies and as streams of server-sent events."""
