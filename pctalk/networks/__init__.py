"""The networks, with the published key names; no input or output."""
