/** What a user can mend; its message says how, in one line. */
export class PageError extends Error {}
