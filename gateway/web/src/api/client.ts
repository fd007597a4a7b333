//! The REST API, typed by its own document (tests/golden/openapi.json), and its failures.
import { signal } from "@preact/signals";
import createClient from "openapi-fetch";
import type { components, paths } from "./schema";

export type Schemas = components["schemas"];
export type Vm = Schemas["Vm"];
export type Operation = Schemas["Operation"];
export type Me = Schemas["Me"];

export const api = createClient<paths>();

/** Who is signed in: undefined while that is not known, null where nobody is. */
export const me = signal<Me | null | undefined>(undefined);

/** Why a request failed. */
export class Failure extends Error {
  constructor(
    /** The HTTP status; 0 where the gateway could not be reached. */
    readonly status: number,
    /** The kind of the problem, as the API names it. */
    readonly code: string,
    detail: string,
    /** What the logs name the request. */
    readonly requestId: string | null,
  ) {
    super(detail);
  }
}

interface Answer<T> {
  data?: T;
  error?: unknown;
  response: Response;
}

/** The body of a success; throws a Failure. A session that is over shows the sign-in. */
export async function ask<T>(call: Promise<Answer<T>>): Promise<T> {
  let answer: Answer<T>;
  try {
    answer = await call;
  } catch (error) {
    if (error instanceof DOMException && error.name === "AbortError") throw error;
    throw new Failure(0, "unreachable", "", null);
  }
  if (answer.response.ok) return answer.data as T;
  const failure = failureOf(answer.response.status, answer.error);
  if (failure.status === 401) me.value = null;
  throw failure;
}

export function failureOf(status: number, body: unknown): Failure {
  // A proxy in front of the gateway may answer with anything.
  const problem = (typeof body === "object" && body !== null ? body : {}) as Partial<Schemas["Problem"]>;
  return new Failure(status, problem.code ?? "unknown", problem.detail ?? "", problem.request_id ?? null);
}

/** Whether the role of who is signed in allows what this role may do. */
export function may(role: Schemas["Role"]): boolean {
  const ranks: Record<Schemas["Role"], number> = { viewer: 0, operator: 1, admin: 2 };
  const mine = me.value;
  return mine ? ranks[mine.role] >= ranks[role] : false;
}
