"""The decode loops: of `wait`, and of `overlap` and `hedge`."""
