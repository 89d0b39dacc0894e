"""What tools/attack_server.py and tools/load_server.py share: a server's process, and clients down to the socket."""
