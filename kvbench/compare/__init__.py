"""`kvkeep bench compare`: the same load on several set-ups, in turns."""
