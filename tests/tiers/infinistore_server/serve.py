"""InfiniStore's own server, but for its wish to be the last that the kernel ends: only root may ask that."""

import sys

import infinistore.server

infinistore.server.prevent_oom = lambda: None
sys.exit(infinistore.server.main())
