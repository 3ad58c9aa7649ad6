"""Parts that several methods share: generators and losses."""
