"""Between engines and the keeper: messages over a unix socket, the arena by file descriptor."""
