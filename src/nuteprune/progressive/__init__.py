"""The paper's own dynamics: masks move along a ramp, and snapshots of the student teach it."""
