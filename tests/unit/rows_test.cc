#include "rows/rows.h"
int main(){}
