"""The WAN lab: several home machines on one Linux box, with the lines between them. See README.md."""
