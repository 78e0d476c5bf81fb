"""How mimo-nano, the small MiMo-V2-Flash in the box, was made."""
