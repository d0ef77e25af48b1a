"""The families of bases (causal, seq2seq, encoder): everything that depends on the family, in one file each."""
