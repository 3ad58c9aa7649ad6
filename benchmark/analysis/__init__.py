"""What is read out of stores: records, statistics, the ledger of claims, merging; tables/, plots/ and report/ show it. No torch here."""
