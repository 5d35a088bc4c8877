"""Pure decisions: values in, values out. Nothing here can wait, read or print."""
