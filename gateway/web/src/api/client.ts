//! REST API client, typed from the OpenAPI document (gateway/openapi.json).
import { signal } from "@preact/signals";
import createClient from "openapi-fetch";
import type { components, paths } from "./schema";

export type Schemas = components["schemas"];
export type Vm = Schemas["Vm"];
export type VmDetail = Schemas["VmDetail"];
export type Operation = Schemas["Operation"];
export type Alert = Schemas["Alert"];
export type Me = Schemas["Me"];

export const api = createClient<paths>();

/** The signed-in user; undefined before the first answer, null when signed out. */
export const me = signal<Me | null | undefined>(undefined);

export class Failure extends Error {
  constructor(
    /** The HTTP status, or 0 if the gateway could not be reached. */
    readonly status: number,
    /** The `code` of the API's problem document. */
    readonly code: string,
    detail: string,
    /** The request ID, as it appears in the logs. */
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

/** Returns the body of a successful answer, else throws a Failure. A 401 switches to the sign-in form. */
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

/** Ends the session of this browser and shows the sign-in form. */
export async function signOut(): Promise<void> {
  try {
    await ask(api.DELETE("/api/v1/sessions/current"));
  } finally {
    me.value = null;
  }
}

export function failureOf(status: number, body: unknown): Failure {
  // A proxy in front of the gateway may answer with any body, so check the shape before using the body as a problem
  // document.
  const problem = (typeof body === "object" && body !== null ? body : {}) as Partial<Schemas["Problem"]>;
  return new Failure(status, problem.code ?? "unknown", problem.detail ?? "", problem.request_id ?? null);
}

/** Whether the signed-in user has this role or a higher one. */
export function may(role: Schemas["Role"]): boolean {
  const ranks: Record<Schemas["Role"], number> = { viewer: 0, operator: 1, admin: 2 };
  const mine = me.value;
  return mine ? ranks[mine.role] >= ranks[role] : false;
}
