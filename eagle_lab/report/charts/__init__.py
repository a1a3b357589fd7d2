"""Every chart of the kit, in one style."""
