"""What tools/attack_inputs.py and tools/attack_files.py attack with: mutated inputs, and folders to build into."""
