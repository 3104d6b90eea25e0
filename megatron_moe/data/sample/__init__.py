"""A sample of real Chinese text from pinned packages: what they hold (`sources`), how they come here
(`registry`), and the files made of them (`write`)."""
